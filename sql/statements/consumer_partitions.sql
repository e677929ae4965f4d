select o.partition, o.next_offset, h.next_offset - o.next_offset as lag, o.received, o.duplicates
from pgonce.consumer_offsets o
join pgonce.partition_heads h on h.topic_id = o.topic_id and h.partition = o.partition
where o.consumer = $1
order by o.partition
