select outcome, attempts
from pgonce.nack(
  $1, $2, $3, $4, $5, permanent => $6,
  retry_at => coalesce($7, pg_catalog.clock_timestamp() operator(pg_catalog.+) pg_catalog.make_interval(secs => $8)))
