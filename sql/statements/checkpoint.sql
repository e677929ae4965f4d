select checkpoint, taken_at::text as taken_at, row_count from pgonce.checkpoint($1, $2)
