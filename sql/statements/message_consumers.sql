-- What each consumer of a topic has made of a message. What is in neither outbox nor queue any more was purged.
-- Indexes: the primary keys of outbox, processed_ids and progress, and queue_message_id_key, once a consumer.
select
  c.consumer,
  case
    when p.message_id is not null then 'processed'
    when q."offset" >= n.next_offset then 'waiting'
    when o.status <> 'SENT' then 'not sent'
    else 'passed'
  end as state,
  p.processed_at::text as processed_at,
  q."offset" - n.next_offset as ahead
from pgonce.consumers c
join pgonce.topics t on t.topic_id = c.topic_id
left join pgonce.outbox o on o.topic_id = c.topic_id and o.message_id = $1
left join pgonce.queue q on q.topic_id = c.topic_id and q.message_id = $1
left join pgonce.consumer_offsets n on n.consumer_id = c.consumer_id and n.partition = q.partition
left join pgonce.processed_ids p on p.consumer_id = c.consumer_id and p.message_id = $1
where t.topic = $2
order by c.consumer
