select moved, stuck from pgcue.give_back($1, 'release')
