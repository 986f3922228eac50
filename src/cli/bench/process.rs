//! What the system knows of processes, where it has /proc.

/// What a process used and holds.
#[derive(Clone, Copy)]
pub(super) struct Stat {
    parent: u32,
    /// Its own processor time, in seconds.
    pub(super) own: f64,
    /// That of its children that have ended.
    ended: f64,
}

pub(super) fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let seconds = |field: usize| Some(fields.get(field)?.parse::<f64>().ok()? / ticks());
    Some(Stat {
        parent: fields.get(1)?.parse().ok()?,
        own: seconds(11)? + seconds(12)?,
        ended: seconds(13)? + seconds(14)?,
    })
}

fn ticks() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

/// The processor time of a process and all its children, dead or alive.
pub(super) fn family(pid: u32) -> Option<f64> {
    let first = stat(pid)?;
    let children: f64 = std::fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|entry| stat(entry.file_name().to_str()?.parse().ok()?))
        .filter(|stat| stat.parent == pid)
        .map(|stat| stat.own)
        .sum();
    Some(first.own + first.ended + children)
}

/// A line of the process's status that is a size, such as `VmHWM`, in bytes.
pub(super) fn memory(pid: u32, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}
