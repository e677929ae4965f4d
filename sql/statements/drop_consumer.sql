select consumer from pgonce.drop_consumer($1)
