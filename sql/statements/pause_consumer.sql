select consumer from pgonce.pause_consumer($1)
