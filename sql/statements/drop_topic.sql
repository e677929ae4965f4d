select topic from pgonce.drop_topic($1)
