select payload from pgcue.jobs where id = $1
