-- Reads only: for a role that may not create topics. No row where it is not there; settings that are left out may be any.
select t.partitions operator(pg_catalog.=) coalesce($2, t.partitions)
  and t.payload_bytes_max operator(pg_catalog.=) coalesce($3, t.payload_bytes_max) as is_as_said
from pgonce.topics t
where t.topic operator(pg_catalog.=) $1
