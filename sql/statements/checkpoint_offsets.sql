select s.partition, s.next_offset, o.next_offset - s.next_offset as messages, greatest(f.floor - s.next_offset, 0) as gone
from pgonce.checkpoints c
join pgonce.consumer_offsets o using (consumer_id)
join pgonce.checkpoint_offsets s on s.checkpoint_id = c.checkpoint_id and s.partition = o.partition
join pgonce.queue_floors f on f.topic_id = o.topic_id and f.partition = o.partition
where o.consumer = $1 and c.checkpoint = $2
order by s.partition
