select outcome, attempts, due_at, withdrawn
from pgonce.fail(
  $1, $2, $3, $4, permanent => $5,
  retry_at => coalesce($6, pg_catalog.clock_timestamp() operator(pg_catalog.+) pg_catalog.make_interval(secs => $7)))
