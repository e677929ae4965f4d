select partition, next_offset, messages from pgonce.restore($1, $2)
