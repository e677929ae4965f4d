select t.relation::text as name,
       (select count(*) from pgonce.checkpoint_rows r where r.checkpoint_id = t.checkpoint_id and r.relation = t.relation) as row_count
from pgonce.checkpoint_tables t
join pgonce.checkpoints c using (checkpoint_id)
join pgonce.consumers r using (consumer_id)
where r.consumer = $1 and c.checkpoint = $2
order by 1
