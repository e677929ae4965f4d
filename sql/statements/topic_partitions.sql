select h.partition, h.earliest_offset, h.next_offset, h.moved
from pgonce.partition_heads h
where h.topic = $1
order by h.partition
