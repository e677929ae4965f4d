-- Emit: messages that a handler sends because of one that it has received.
--
-- They are sent in the handler's transaction, so they exist if and only if its effect does. Their ids follow from the consumer,
-- the message and a number that the handler gives: whatever makes it handle the message again (a restore, a replay)
-- makes the same ids, and what was sent before is a duplicate.
--
-- Locks: those of enqueue, none but on an id that another transaction is sending.

create or replace function pgonce.emitted_id(consumer text, message_id text, ordinal integer)
returns text
language sql immutable strict
set search_path = pg_catalog, pg_temp
as $$
  select substr(encode(sha256(convert_to(jsonb_build_array(consumer, message_id, ordinal)::text, 'UTF8')), 'hex'), 1, 32)
$$;
comment on function pgonce.emitted_id is 'The id of the message that a consumer emits because of another one: 32 hexadecimal digits of the SHA-256 of the JSON array [consumer, message id, ordinal].';

create or replace function pgonce.emit(
  topic text,
  payload jsonb,
  consumer text,
  message_id text,
  ordinal integer default 1,
  key text default null,
  headers jsonb default null)
returns setof pgonce.enqueued
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if consumer is null or message_id is null or ordinal is null then
    raise exception using errcode = 'PO003',
      message = format('emit for message %L of consumer %L, number %s', message_id, consumer, coalesce(ordinal::text, 'null')),
      hint = 'Give the consumer and the message id as receive has answered them, and number the messages that are emitted because of it from 1.';
  end if;
  return query
    select e.message_id, e.was_duplicate
    from pgonce.enqueue(
      topic, payload, key => emit.key, message_id => pgonce.emitted_id(consumer, emit.message_id, ordinal), headers => emit.headers) e;
end $$;
comment on function pgonce.emit is 'enqueue from inside a handler: sends a message because of the one that was received, as the ordinal-th of it, in the handler''s transaction. Its id follows from consumer, message_id and ordinal (emitted_id), so that a message that is handled again, after a restore or a replay, sends nothing twice. Errors: PO001, PO003, PO004.';
