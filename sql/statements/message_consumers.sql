-- What each consumer of a topic has made of a message. What is in neither outbox nor queue any more was purged.
-- Indexes: the primary keys of outbox, processed_ids and progress, and queue_message_id_key, once a consumer; of parked and
-- dead_letters what the consumer has in that partition.
select
  c.consumer,
  case
    when p.message_id is not null then 'processed'
    when k.message_id is not null then 'parked'
    when d.state <> 'replayed' then d.state
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
left join pgonce.parked k
  on k.consumer_id = c.consumer_id and k.partition = coalesce(q.partition, o.partition) and k.message_id = $1
left join lateral (
  -- One that was replayed may be dead again.
  select l.state from pgonce.dead_letters l
  where l.consumer_id = c.consumer_id and l.partition = coalesce(q.partition, o.partition) and l.message_id = $1
  order by l.dead_letter_id desc
  limit 1) d on true
where t.topic = $2
order by c.consumer
