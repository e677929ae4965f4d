-- Reads only: for a role that may not create consumers.
select exists (
  select from pgonce.consumers c
  join pgonce.topics t on t.topic_id operator(pg_catalog.=) c.topic_id
  where c.consumer operator(pg_catalog.=) $1 and t.topic operator(pg_catalog.=) $2
) as is_there
