select partition, next_offset, messages from pgonce.replay($1, $2, $3, reapply_effects => $4)
