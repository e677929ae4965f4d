-- The next messages, each recorded as delivered: one that was delivered before, by itself, is a duplicate.
with received as materialized (
  select r."offset", r.message_id, r.payload from pgonce.receive($1, max => $2) r
)
select
  r.payload::text as message,
  (select p.was_duplicate from pgonce.process_once($3, r.message_id) p) as was_duplicate
from received r
order by r."offset"
