select r.partition, r."offset", r.attempt
from pgonce.received r
order by r."offset"
