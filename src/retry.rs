//! When a failed attempt runs again.

use std::time::Duration;

/// Exponential backoff with jitter. The delay after attempt `n` (the first is 1) is
///
/// ```text
/// min(base * factor^(n - 1), max) * (1 - jitter * u),   u uniform in [0, 1)
/// ```
///
/// The default is 1 s doubling up to an hour, with a jitter of one half: 0.5 to 1 s after the first
/// attempt, 1 to 2 s after the second. Jitter spreads the retries of jobs that failed together
/// (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015). The SQL function
/// `backoff` computes the default.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryPolicy {
    /// The longest delay after the first attempt.
    pub base: Duration,
    /// What each further attempt multiplies it with.
    pub factor: f64,
    /// No delay is longer.
    pub max: Duration,
    /// Which share of the delay is random, 0 to 1.
    pub jitter: f64,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        RetryPolicy { base: Duration::from_secs(1), factor: 2.0, max: Duration::from_secs(3600), jitter: 0.5 }
    }
}

impl RetryPolicy {
    /// The same delay after every attempt, without jitter.
    pub const fn fixed(delay: Duration) -> Self {
        RetryPolicy { base: delay, factor: 1.0, max: delay, jitter: 0.0 }
    }

    /// The delay after attempt `attempt` for a random number `u` in [0, 1).
    pub fn delay(&self, attempt: u16, u: f64) -> Duration {
        let exponent = i32::from(attempt.max(1)) - 1;
        let full = (self.base.as_secs_f64() * self.factor.powi(exponent)).min(self.max.as_secs_f64());
        // What no duration can hold is as long as any.
        Duration::try_from_secs_f64((full * (1.0 - self.jitter * u)).max(0.0)).unwrap_or(self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn doubles_up_to_the_longest() {
        let policy = RetryPolicy { jitter: 0.0, ..Default::default() };
        let seconds: Vec<u64> = [1, 2, 3, 12, 13, 25].map(|n| policy.delay(n, 0.0).as_secs()).to_vec();
        assert_eq!(seconds, [1, 2, 4, 2048, 3600, 3600]);
    }

    proptest! {
        #[test]
        fn any_policy_has_a_delay(base: u64, max: u64, factor: f64, jitter: f64, attempt: u16, u in 0.0..1.0f64) {
            let policy = RetryPolicy { base: Duration::from_secs(base), factor, max: Duration::from_secs(max), jitter };
            let delay = policy.delay(attempt, u);
            let bounded = delay.as_secs_f64() <= policy.max.as_secs_f64();
            prop_assert!(bounded || !(0.0..=1.0).contains(&jitter), "{delay:?}");
        }

        #[test]
        fn stays_between_half_and_whole(attempt in 1u16..2000, u in 0.0..1.0f64) {
            let policy = RetryPolicy::default();
            let whole = RetryPolicy { jitter: 0.0, ..policy }.delay(attempt, 0.0);
            let delay = policy.delay(attempt, u);
            prop_assert!(delay <= whole && delay >= whole / 2 - Duration::from_nanos(1));
        }
    }
}
