select topic from pgonce.pause_topic($1)
