-- Deliveries, in order. (As to the subquery see process.sql.)
select (select p.was_duplicate from pgonce.process_once($1, l.message_id) p) as was_duplicate
from unnest($2::text[]) with ordinality l(message_id, nth)
order by l.nth
