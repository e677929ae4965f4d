select part, name, messages, added, removed, changed, samples from pgonce.checkpoint_difference($1, $2, $3)
