select topic from pgonce.create_topic($1, partitions => $2, payload_bytes_max => $3)
