-- Reads only: for a role that may not create topics. Settings that are left out may be any.
select exists (
  select from pgonce.topics t
  where t.topic operator(pg_catalog.=) $1
    and t.partitions operator(pg_catalog.=) coalesce($2, t.partitions)
    and t.payload_bytes_max operator(pg_catalog.=) coalesce($3, t.payload_bytes_max)
) as is_there
