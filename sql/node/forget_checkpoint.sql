-- Makes room for a checkpoint of the same name.
select d.checkpoint
from pgonce.checkpoints c
join pgonce.consumers n on n.consumer_id = c.consumer_id
cross join lateral pgonce.delete_checkpoint(n.consumer, c.checkpoint) d
where n.consumer = $1 and c.checkpoint = $2
