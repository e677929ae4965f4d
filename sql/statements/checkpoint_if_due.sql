select checkpoint
from pgonce.checkpoint_if_due(
  $1, $2::bigint operator(pg_catalog.*) interval '1 millisecond', $3)
