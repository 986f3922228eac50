select payload from pgcue.jobs where id = $1 and token = $2
