select checkpoint from pgonce.delete_checkpoint($1, $2)
