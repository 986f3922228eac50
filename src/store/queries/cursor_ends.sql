select queue, key, version, state from pgcue.cursors
