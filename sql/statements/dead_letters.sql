-- Dead letters in their order, a page at a time, without what they say. The same filters as dead_letter_count.
-- Index: the primary key of dead_letters.
select dead_letter_id, consumer, topic, partition, "offset", message_id, key, attempts, error, failed_at::text as failed_at,
       state, settled_at::text as settled_at, settled_by::text as settled_by
from pgonce.dead_letter_list
where dead_letter_id > $1
  and ($2 = 'all' or state = $2)
  and ($3::text is null or consumer = $3)
  and ($4::text is null or topic = $4)
  and ($5::text is null or key = $5)
  and ($6::text is null or strpos(error, $6) > 0)
  and failed_at <= coalesce($9::timestamptz, clock_timestamp()) - coalesce($7::float8, 0) * interval '1 second'
  and ($8::float8 is null or failed_at >= coalesce($9::timestamptz, clock_timestamp()) - $8 * interval '1 second')
order by dead_letter_id
limit $10
