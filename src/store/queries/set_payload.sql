update pgcue.jobs set payload = $2 where id = $1 and token is null returning id
