-- Inbox: messages that come from elsewhere (a webhook, another broker), processed once.
--
-- Locks: no row of pgonce. A second call with the same id waits for the transaction of the first to end; above READ
-- COMMITTED it may get 40001. Index: the primary key of processed_ids.

create or replace function pgonce.process_once(consumer text, message_id text)
returns setof pgonce.processed
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  inbox pgonce.consumers;
  answer pgonce.processed;
begin
  inbox := pgonce.consumer_row(consumer);
  if inbox.topic_id is not null then
    raise exception using errcode = 'PO007', message = format('consumer %L reads a topic', consumer),
      hint = 'Use receive for it, or create an inbox: select * from pgonce.create_consumer(...) without a topic.';
  elsif message_id is null or octet_length(message_id) not between 1 and 255 then
    raise exception using errcode = 'PO004',
      message = format('message id of %s bytes', coalesce(octet_length(message_id)::text, 'null')),
      hint = 'A message id has 1 to 255 bytes.';
  end if;
  insert into pgonce.processed_ids (consumer_id, message_id) values (inbox.consumer_id, process_once.message_id)
  on conflict do nothing;
  answer := (process_once.message_id, not found);
  if answer.was_duplicate then
    insert into pgonce.duplicate_receipts (consumer_id, message_id) values (inbox.consumer_id, process_once.message_id);
  end if;
  return next answer;
end $$;
comment on function pgonce.process_once is 'Records that an inbox has processed a message, in the caller''s transaction, and answers was_duplicate = false for the first time only: apply the effect then. Errors: PO002, PO004, PO007 (the consumer reads a topic).';
