select unsent, queued from pgonce.purge_topic($1)
