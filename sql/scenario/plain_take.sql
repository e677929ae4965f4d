-- The message stays in the queue until it is acknowledged, and comes again if it never is.
select id, payload::text as payload from pgonce.plain_queue order by id limit 1
