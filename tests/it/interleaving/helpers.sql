-- What the specifications call, and the books that the oracle reads. Installed into the database of each of them.

create schema test;

create table test.ledger (
  "position" bigint generated always as identity,
  topic text not null,
  step text not null,
  message_id text not null,
  key text,
  delayed boolean not null,
  was_duplicate boolean not null
);
create index on test.ledger (topic);
comment on table test.ledger is 'The business rows: written in the transaction of each enqueue, with what it was told.';

create table test.taken_back (
  topic text not null,
  message_id text not null
);
create index on test.taken_back (topic);
comment on table test.taken_back is 'Messages that were cancelled or deleted while PENDING, written in that transaction.';

create table test.applied (
  "position" bigint generated always as identity,
  consumer_id integer not null,
  partition integer not null,
  "offset" bigint not null,
  message_id text not null,
  key text
);
create index on test.applied (consumer_id);
comment on table test.applied is 'The effects: one row for each message that a consumer received, in its transaction.';

create table test.totals (
  consumer_id integer not null,
  partition integer not null,
  total bigint not null,
  primary key (consumer_id, partition)
);
comment on table test.totals is 'An effect that reads what the batch before it wrote.';

create table test.broken (
  topic text not null,
  words text not null
);
comment on table test.broken is 'Promises that a helper saw broken.';

create table test.inbox (
  topic text not null,
  message_id text not null,
  was_duplicate boolean not null
);
create index on test.inbox (topic);
comment on table test.inbox is 'What process_once answered, written in its transaction.';

create table test.permutations (
  topic text primary key,
  first_consumer_id integer not null
);

create function test.open(topic text, consumer text, partitions integer, with_consumer boolean)
returns void
language plpgsql
as $$
begin
  perform from pgonce.create_topic(open.topic, open.partitions);
  insert into test.permutations
  select open.topic, coalesce(max(c.consumer_id), 0) + 1 from pgonce.consumers c;
  if with_consumer then
    perform from pgonce.create_consumer(open.consumer, open.topic);
  end if;
end $$;

create function test.send(topic text, step text, message_id text, key text, deliver_at timestamptz default null)
returns table (was_duplicate boolean)
language plpgsql
as $$
declare
  told pgonce.enqueued;
begin
  select e.* into strict told
  from pgonce.enqueue(send.topic, '{}', key => send.key, message_id => send.message_id, deliver_at => send.deliver_at) e;
  insert into test.ledger (topic, step, message_id, key, delayed, was_duplicate)
  values (send.topic, send.step, send.message_id, send.key, send.deliver_at is not null, told.was_duplicate);
  return query select told.was_duplicate;
end $$;

create function test.send_many(topic text, step text, message_ids text[], keys text[])
returns table (was_duplicate boolean)
language plpgsql
as $$
begin
  return query
    with told as materialized (
      select e.*
      from pgonce.enqueue_many(
        send_many.topic, array_fill('{}'::jsonb, array[cardinality(send_many.message_ids)]),
        keys => send_many.keys, message_ids => send_many.message_ids) e
    ),
    noted as (
      insert into test.ledger (topic, step, message_id, key, delayed, was_duplicate)
      select send_many.topic, send_many.step, t.message_id, send_many.keys[t."position"], false, t.was_duplicate
      from told t
      order by t."position"
    )
    select t.was_duplicate from told t order by t."position";
end $$;

create function test.cancel(topic text, message_id text)
returns table (was_cancelled boolean)
language plpgsql
as $$
begin
  return query
    with told as materialized (
      select c.* from pgonce.cancel(cancel.topic, cancel.message_id) c
    ),
    noted as (
      insert into test.taken_back (topic, message_id)
      select cancel.topic, t.message_id from told t where t.was_cancelled
    )
    select t.was_cancelled from told t;
end $$;

create function test.remove(topic text, message_id text)
returns table (removed bigint)
language plpgsql
as $$
begin
  return query
    with gone as (
      delete from pgonce.outbox o
      using pgonce.topics t
      where t.topic = remove.topic and o.topic_id = t.topic_id and o.message_id = remove.message_id and o.status = 'PENDING'
      returning o.message_id
    ),
    noted as (
      insert into test.taken_back (topic, message_id) select remove.topic, g.message_id from gone g
    )
    select count(*) from gone g;
end $$;

create function test.process_once(topic text, message_id text)
returns table (was_duplicate boolean)
language plpgsql
as $$
begin
  return query
    with told as materialized (
      select p.* from pgonce.process_once(process_once.topic, process_once.message_id) p
    ),
    noted as (
      insert into test.inbox (topic, message_id, was_duplicate)
      select process_once.topic, t.message_id, t.was_duplicate from told t
    )
    select t.was_duplicate from told t;
end $$;

create function test.id_of(consumer text)
returns integer
language sql stable
as $$ select c.consumer_id from pgonce.consumers c where c.consumer = id_of.consumer $$;

create function test.pass_gate(consumer text)
returns integer
language plpgsql volatile
as $$
begin
  -- Waits for the transaction that passed before, so that the statement around it grows stale.
  perform pg_advisory_xact_lock(hashtext(pass_gate.consumer));
  return 2;
end $$;

-- As a worker does it: receive first, then the statements of the handler, each in a snapshot of its own.
create function test.apply(consumer text, max integer default 10)
returns bigint
language plpgsql volatile
as $$
declare
  reader pgonce.consumers;
  got bigint := 0;
  one record;
begin
  select c.* into reader from pgonce.consumers c where c.consumer = apply.consumer;
  for one in select * from pgonce.receive(apply.consumer, apply.max) loop
    insert into test.applied (consumer_id, partition, "offset", message_id, key)
    values (reader.consumer_id, one.partition, one."offset", one.message_id, one.key);
    got := got + 1;
  end loop;
  if got > 0 then
    insert into test.totals (consumer_id, partition, total)
    values (
      reader.consumer_id, one.partition,
      got + coalesce((select t.total from test.totals t where t.consumer_id = reader.consumer_id and t.partition = one.partition), 0))
    on conflict (consumer_id, partition) do update set total = excluded.total;
    if reader.paused then
      insert into test.broken (topic, words)
      select t.topic, format('receive answered %s messages to a paused consumer', got)
      from pgonce.topics t where t.topic_id = reader.topic_id;
    end if;
  end if;
  return got;
end $$;

create procedure test.drain(topic text, consumer text, rounds_max integer)
language plpgsql
as $$
declare
  moved bigint;
  got bigint;
  due_at timestamptz;
begin
  for round in 1 .. rounds_max loop
    select coalesce(sum(r.moved), 0) into strict moved from pgonce.relay(drain.topic) r;
    commit;
    got := test.apply(drain.consumer);
    commit;
    if moved = 0 and got = 0 then
      select min(o.deliver_at) into due_at
      from pgonce.outbox o join pgonce.topics t using (topic_id) where t.topic = drain.topic;
      if due_at is null then
        return;
      end if;
      perform pg_sleep(extract(epoch from due_at - clock_timestamp()));
    end if;
  end loop;
  insert into test.broken (topic, words) values (drain.topic, format('still something to do after %s rounds', rounds_max));
end $$;

create function test.state(topic text, consumer text)
returns jsonb
language plpgsql stable
set plan_cache_mode = force_generic_plan
as $$
begin
  return (with here as materialized (
    select t.topic_id, test.id_of(state.consumer) as consumer_id, p.first_consumer_id
    from pgonce.topics t join test.permutations p using (topic)
    where t.topic = state.topic
  )
  select jsonb_build_object(
    'consumer_id', h.consumer_id,
    'ledger', (select coalesce(jsonb_agg(l order by l."position"), '[]') from test.ledger l where l.topic = state.topic),
    'taken_back', (select coalesce(jsonb_agg(b.message_id), '[]') from test.taken_back b where b.topic = state.topic),
    'queue', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'partition', q.partition, 'offset', q."offset", 'message_id', q.message_id, 'key', q.key) order by q.partition, q."offset"), '[]')
      from pgonce.queue q where q.topic_id = h.topic_id),
    'unsent', (
      select coalesce(jsonb_agg(o.message_id), '[]') from pgonce.outbox o where o.topic_id = h.topic_id and o.status <> 'SENT'),
    'sent', (select count(*) from pgonce.outbox o where o.topic_id = h.topic_id and o.status = 'SENT'),
    'set_aside', (select count(*) from pgonce.set_aside s where s.topic_id = h.topic_id),
    'duplicate_sends', (select count(*) from pgonce.duplicate_sends d where d.topic_id = h.topic_id),
    'heads', (
      select coalesce(jsonb_agg(p), '[]') from pgonce.partition_heads p where p.topic = state.topic),
    'progress', (
      select coalesce(jsonb_agg(o), '[]') from pgonce.consumer_offsets o where o.consumer_id = h.consumer_id),
    'processed', (
      select coalesce(jsonb_agg(p), '[]') from pgonce.processed_ids p where p.consumer_id = h.consumer_id),
    'totals', (
      select coalesce(jsonb_agg(t), '[]') from test.totals t where t.consumer_id = h.consumer_id),
    'applied', (
      select coalesce(jsonb_agg(a order by a."position"), '[]') from test.applied a where a.consumer_id >= h.first_consumer_id),
    'left_behind', (
      select count(*) from (
        select p.consumer_id from pgonce.progress p where p.consumer_id >= h.first_consumer_id
        union all
        select p.consumer_id from pgonce.processed_ids p where p.consumer_id >= h.first_consumer_id) x
      where x.consumer_id not in (select c.consumer_id from pgonce.consumers c)),
    'broken', (
      select coalesce(jsonb_agg(b.words), '[]')
      from (
        select b.words from test.broken b where b.topic = state.topic
        union all
        select format('once applied: %s came %s times to the inbox', i.message_id, count(*) filter (where not i.was_duplicate))
        from test.inbox i where i.topic = state.topic
        group by i.message_id
        having count(*) filter (where not i.was_duplicate) <> 1) b))
  from here h);
end $$;
