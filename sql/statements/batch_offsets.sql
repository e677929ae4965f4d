select min(r.partition) as partition, array_agg(r."offset" order by r."offset") as offsets
from pgonce.received r
