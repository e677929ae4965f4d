select (select coalesce(sum(pending), 0)::bigint from pgonce.outbox_status) as pending,
       (select coalesce(sum(lag), 0)::bigint from pgonce.consumer_lag) as lag,
       (select coalesce(sum(received), 0)::bigint from pgonce.consumer_lag) as received
