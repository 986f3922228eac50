select rule, queue, job, cursor_key, token, found, repair from pgcue.verify()
