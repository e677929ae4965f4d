-- What became of a message, in each topic that knows it: the outbox says until it is collected, the queue says then.
-- Indexes: the primary key of outbox and queue_message_id_key, once a topic.
select
  t.topic,
  coalesce(o.partition, q.partition) as partition,
  q."offset",
  coalesce(o.status, 'SENT') as state,
  coalesce(o.key, q.key) as key,
  coalesce(o.bytes, q.bytes) as bytes,
  coalesce(o.enqueued_at, q.enqueued_at)::text as enqueued_at,
  o.deliver_at::text as deliver_at,
  case when $3 then coalesce(o.payload, q.payload)::text end as payload
from pgonce.topics t
left join pgonce.outbox o on o.topic_id = t.topic_id and o.message_id = $1
left join pgonce.queue q on q.topic_id = t.topic_id and q.message_id = $1
where ($2::text is null or t.topic = $2)
  and (o.message_id is not null or q.message_id is not null)
order by t.topic
