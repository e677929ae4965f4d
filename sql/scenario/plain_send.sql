insert into pgonce.plain_queue (payload) values ($1::jsonb)
