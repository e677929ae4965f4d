select partition, messages, is_suspect from pgonce.take_suspicion($1, $2)
