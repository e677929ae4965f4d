select consumer from pgonce.create_consumer($1, $2, start_at => $3)
