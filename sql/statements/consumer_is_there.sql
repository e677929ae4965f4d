-- Reads only: for a role that may not create consumers. No row where it is not there; $2 is null for an inbox.
select t.topic operator(pg_catalog.=) $2 or t.topic is null and $2 is null as is_as_said
from pgonce.consumers c
left join pgonce.topics t on t.topic_id operator(pg_catalog.=) c.topic_id
where c.consumer operator(pg_catalog.=) $1
