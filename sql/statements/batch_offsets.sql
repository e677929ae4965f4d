select pg_catalog.min(r.partition) as partition, pg_catalog.array_agg(r."offset" order by r."offset") as offsets
from pgonce.received r
