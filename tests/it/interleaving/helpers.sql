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
  key text,
  writer xid8 not null default pg_current_xact_id()
);
create index on test.applied (consumer_id);
comment on table test.applied is 'The effects: one row for each message that a consumer received, in its transaction.';

create table test.failed (
  "position" bigint generated always as identity,
  consumer_id integer not null,
  partition integer not null,
  outcome text not null
);
create index on test.failed (consumer_id);
comment on table test.failed is 'What fail answered, written in its transaction.';

create table test.settled (
  topic text not null,
  dead_letter_id bigint not null
);
create index on test.settled (topic);
comment on table test.settled is 'Dead letters that a replay or a discard was told to have settled, written in its transaction.';

create table test.purged (
  topic_id integer not null,
  partition integer not null,
  "offset" bigint not null,
  message_id text not null,
  was_applied boolean not null
);
create index on test.purged (topic_id);
comment on table test.purged is 'Messages that were deleted from the queue, and whether they had been applied by then.';

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

create function test.note_purged()
returns trigger
language plpgsql
as $$
begin
  insert into test.purged (topic_id, partition, "offset", message_id, was_applied)
  select d.topic_id, d.partition, d."offset", d.message_id, exists (
    select from test.applied a join pgonce.consumers c using (consumer_id)
    where c.topic_id = d.topic_id and a.message_id = d.message_id)
  from deleted d;
  return null;
end $$;
create trigger note_purged after delete on pgonce.queue
referencing old table as deleted for each statement execute function test.note_purged();

create function test.fail(consumer text, "offset" bigint, permanent boolean default false, partition integer default 0)
returns table (outcome text)
language plpgsql
as $$
#variable_conflict use_column
declare
  told pgonce.failed;
  reader_id integer := test.id_of(fail.consumer);
begin
  select f.* into strict told from pgonce.fail(fail.consumer, fail.partition, fail."offset", 'as told', fail.permanent) f;
  insert into test.failed (consumer_id, partition, outcome) values (reader_id, fail.partition, told.outcome);
  -- As if the effect of what is withdrawn had been rolled back to a savepoint; never an effect of another transaction.
  with undone as (
    delete from test.applied a
    where a.consumer_id = reader_id and a.partition = fail.partition and a."offset" = any (told.withdrawn)
      and a.writer = pg_current_xact_id()
    returning a."offset"
  )
  update test.totals t set total = t.total - (select count(*) from undone u)
  where t.consumer_id = reader_id and t.partition = fail.partition and exists (select from undone u);
  return query select told.outcome;
end $$;

-- The effects once more, in a table that checkpoints hold.
create function test.mirror()
returns trigger
language plpgsql
as $$
begin
  if current_setting('test.restores', true) = 'true' then
    null;
  elsif tg_op = 'INSERT' then
    insert into pgonce.word_counts as w (consumer, word, count)
    select c.consumer, new.message_id, 1 from pgonce.consumers c where c.consumer_id = new.consumer_id
    on conflict (consumer, word) do update set count = w.count + 1;
  else
    delete from pgonce.word_counts w using pgonce.consumers c
    where c.consumer_id = old.consumer_id and w.consumer = c.consumer and w.word = old.message_id;
  end if;
  return null;
end $$;
create trigger mirror after insert or delete on test.applied for each row execute function test.mirror();

create table test.checkpoints (
  consumer text not null,
  checkpoint text not null,
  failed bigint not null
);
comment on table test.checkpoints is 'How far test.failed had come at a checkpoint.';

create function test.checkpoint(consumer text, checkpoint text)
returns bigint
language plpgsql
as $$
begin
  insert into test.checkpoints
  values (checkpoint.consumer, checkpoint.checkpoint, (select coalesce(max(f."position"), 0) from test.failed f));
  return (select c.row_count from pgonce.checkpoint(checkpoint.consumer, checkpoint.checkpoint) c);
end $$;

-- A drain makes up for some of what a checkpoint got wrong; this is what was saved.
create function test.check_moment(consumer text)
returns void
language plpgsql
as $$
begin
  perform test.break_promise(
    check_moment.consumer,
    format('restored up to %s, and %s of offset %s is there %s times', o.next_offset, q.message_id, q."offset", there.times))
  from pgonce.consumer_offsets o
  join pgonce.queue q using (topic_id, partition)
  cross join lateral (
    select count(*) as times, coalesce(bool_or(p.is_effect), false) as is_applied
    from (
      select true as is_effect from pgonce.word_counts w where w.consumer = o.consumer and w.word = q.message_id
      union all
      select false from pgonce.parked k
      where k.consumer_id = o.consumer_id and k.partition = q.partition and k."offset" = q."offset"
      union all
      select false from pgonce.dead_letters d
      where d.consumer_id = o.consumer_id and d.partition = q.partition and d."offset" = q."offset" and d.state <> 'replayed') p) there
  where o.consumer = check_moment.consumer
    and (case when q."offset" < o.next_offset then there.times <> 1 else there.times > 1 or there.is_applied end);
  perform test.break_promise(
    check_moment.consumer,
    format('restored with %s received and %s dead, and there are %s and %s', o.received, o.dead, there.applied, there.dead))
  from (
    select c.consumer_id, sum(c.received) as received, sum(c.dead) as dead
    from pgonce.consumer_offsets c
    where c.consumer = check_moment.consumer
    group by c.consumer_id) o
  cross join lateral (
    select
      (select count(*) from pgonce.word_counts w where w.consumer = check_moment.consumer) as applied,
      (select count(*) from pgonce.dead_letters d where d.consumer_id = o.consumer_id) as dead) there
  where (o.received, o.dead) is distinct from (there.applied, there.dead);
end $$;

create function test.restore(consumer text, checkpoint text)
returns text
language plpgsql
as $$
declare
  reader_id integer := test.id_of(restore.consumer);
  told text;
begin
  select string_agg(r.partition || ':' || r.next_offset, ' ') into told
  from pgonce.restore(restore.consumer, restore.checkpoint) r;
  -- Under the locks that it has taken.
  insert into test.voided (consumer, partition, epoch)
  select e.consumer, e.partition, max(e.epoch) from test.epochs e
  where e.consumer = restore.consumer
  group by e.consumer, e.partition;
  perform set_config('test.restores', 'true', true);
  delete from test.applied a
  where a.consumer_id = reader_id and not exists (
    select from pgonce.word_counts w where w.consumer = restore.consumer and w.word = a.message_id);
  insert into test.applied (consumer_id, partition, "offset", message_id, key)
  select reader_id, q.partition, q."offset", q.message_id, q.key
  from pgonce.word_counts w
  join pgonce.consumers c using (consumer)
  join pgonce.queue q on q.topic_id = c.topic_id and q.message_id = w.word
  where c.consumer_id = reader_id
    and not exists (select from test.applied a where a.consumer_id = reader_id and a.message_id = w.word)
  order by q.partition, q."offset";
  perform set_config('test.restores', 'false', true);
  delete from test.totals t where t.consumer_id = reader_id;
  insert into test.totals (consumer_id, partition, total)
  select reader_id, a.partition, count(*) from test.applied a where a.consumer_id = reader_id group by a.partition;
  delete from test.failed f
  using test.checkpoints c
  where f.consumer_id = reader_id and c.consumer = restore.consumer and c.checkpoint = restore.checkpoint
    and f."position" > c.failed;
  perform test.check_moment(restore.consumer);
  return told;
end $$;

-- For what a restore takes back in the end: received counts what comes again once more.
create function test.replay(consumer text, from_offset bigint)
returns bigint
language plpgsql
as $$
declare
  reader_id integer := test.id_of(replay.consumer);
  again bigint;
begin
  select sum(r.messages) into strict again from pgonce.replay(replay.consumer, replay.from_offset, reapply_effects => true) r;
  -- Under the locks that it has taken.
  delete from test.applied a where a.consumer_id = reader_id and a."offset" >= replay.from_offset;
  update test.totals t
  set total = (select count(*) from test.applied a where a.consumer_id = t.consumer_id and a.partition = t.partition)
  where t.consumer_id = reader_id;
  return again;
end $$;

-- Takes back what the consumer has applied, as if it had failed after its COMMIT.
create function test.bury(consumer text, "offset" bigint)
returns text
language plpgsql
as $$
#variable_conflict use_column
declare
  told pgonce.buried;
  reader_id integer := test.id_of(bury.consumer);
begin
  select b.* into strict told from pgonce.bury(bury.consumer, 0, bury."offset", 'as told') b;
  insert into test.failed (consumer_id, partition, outcome) values (reader_id, 0, told.outcome);
  if told.outcome = 'dead' then
    delete from test.applied a where a.consumer_id = reader_id and a.partition = 0 and a."offset" = bury."offset";
    update test.totals t set total = t.total - 1 where t.consumer_id = reader_id and t.partition = 0;
  end if;
  return told.outcome;
end $$;

-- The transaction of a handler, which others find by its number.
create function test.handler_begins(consumer text)
returns xid8
language sql volatile
as $$ select pg_current_xact_id() $$;

create function test.hand_over(consumer text, max integer)
returns bigint[]
language plpgsql volatile
as $$
declare
  handler xid8 := (
    select a.backend_xid::text::xid8 from pg_stat_activity a
    where a.datname = current_database()
      and a.query like '%test.handler%' and position(quote_literal(hand_over.consumer) in a.query) > 0);
  offsets bigint[];
begin
  if handler is null then
    return null;
  end if;
  offsets := array(select r."offset" from pgonce.receive(hand_over.consumer, hand_over.max) r);
  if cardinality(offsets) > 0 then
    perform pgonce.hand_over(hand_over.consumer, 0, offsets, handler);
  end if;
  return offsets;
end $$;

create function test.handler_acts(consumer text)
returns bigint[]
language plpgsql volatile
as $$
declare
  note pgonce.progress;
begin
  select n.* into note
  from pgonce.consumer_partitions p
  cross join lateral pgonce.newest_progress(p.consumer_id, p.partition) n
  where p.consumer_id = test.id_of(handler_acts.consumer) and n.handler = pg_current_xact_id();
  insert into test.applied (consumer_id, partition, "offset", message_id, key)
  select note.consumer_id, 0, q."offset", q.message_id, q.key
  from pgonce.queue q join pgonce.consumers c using (topic_id)
  where c.consumer_id = note.consumer_id and q.partition = 0 and q."offset" = any (note.handed_over)
  order by q."offset";
  return note.handed_over;
end $$;

create function test.handler_finishes(consumer text)
returns boolean
language plpgsql volatile
as $$
declare
  acted bigint := (select count(*) from test.applied a where a.writer = pg_current_xact_id());
begin
  if acted = 0 then
    return null;
  elsif not pgonce.finish_handover(handler_finishes.consumer, 0) then
    perform test.break_promise(handler_finishes.consumer, 'what was handed over was taken from a handler that lives');
    return false;
  end if;
  insert into test.totals as t (consumer_id, partition, total) values (test.id_of(handler_finishes.consumer), 0, acted)
  on conflict (consumer_id, partition) do update set total = t.total + excluded.total;
  return true;
end $$;

create function test.note_buried()
returns trigger
language plpgsql
as $$
begin
  insert into test.failed (consumer_id, partition, outcome) values (new.consumer_id, new.partition, 'dead');
  return null;
end $$;
create trigger note_buried after insert on pgonce.dead_letters for each row
when (new.error like 'its handler %' or new.error like 'whoever tried it %') execute function test.note_buried();

create function test.settle(topic text, consumer text, how text)
returns table (settled bigint)
language plpgsql
as $$
declare
  ids bigint[] := array(select d.dead_letter_id from pgonce.dead_letters d where d.consumer_id = test.id_of(settle.consumer));
begin
  return query
    with told as materialized (
      select r.dead_letter_id from pgonce.replay_dead_letters(case settle.how when 'replay' then ids end) r where r.was_settled
      union all
      select d.dead_letter_id from pgonce.discard_dead_letters(case settle.how when 'discard' then ids end) d where d.was_settled
    ),
    noted as (
      insert into test.settled (topic, dead_letter_id) select settle.topic, t.dead_letter_id from told t
    )
    select count(*) from told t;
end $$;

create function test.make_due(consumer text)
returns void
language plpgsql
as $$
begin
  update pgonce.parked k set due_at = clock_timestamp()
  where k.consumer_id = test.id_of(make_due.consumer) and k.due_at > clock_timestamp();
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

create function test.wait_at_gate(consumer_id integer)
returns void
language plpgsql volatile
as $$
declare
  gate constant integer := (select hashtext(c.consumer) from pgonce.consumers c where c.consumer_id = wait_at_gate.consumer_id);
begin
  -- Waits for the transaction that has passed it, and leaves it open: for guards, which let others in where nobody may be.
  perform pg_advisory_lock(gate), pg_advisory_unlock(gate);
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

-- What a member of an external consumer has at hand. Leases are for a moment, so that anybody may acquire at any time.
create table test.hands (
  consumer text not null,
  member integer not null,
  partition integer not null,
  epoch bigint not null,
  offsets bigint[] not null,
  was_parked boolean,
  primary key (consumer, member)
);

create table test.epochs (
  consumer text not null,
  partition integer not null,
  epoch bigint not null,
  unique (consumer, partition, epoch)
);
comment on table test.epochs is 'Every acquisition, in its transaction.';

create table test.voided (
  consumer text not null,
  partition integer not null,
  epoch bigint not null
);
comment on table test.voided is 'The epochs that were in force when a checkpoint was restored.';

create function test.break_promise(consumer text, words text)
returns void
language sql
as $$
  insert into test.broken (topic, words)
  select t.topic, break_promise.words from pgonce.consumers c join pgonce.topics t using (topic_id)
  where c.consumer = break_promise.consumer
$$;

create function test.acquire(consumer text, member integer)
returns bigint
language plpgsql
as $$
declare
  got pgonce.acquired;
begin
  select a.* into got
  from pgonce.acquire(acquire.consumer, ('00000000-0000-4000-8000-00000000000' || acquire.member)::uuid, 1, 1) a;
  if got.epoch is null then
    return null;
  end if;
  insert into test.epochs values (acquire.consumer, got.partition, got.epoch) on conflict do nothing;
  if not found then
    perform test.break_promise(acquire.consumer, format('epoch %s was given twice', got.epoch));
  end if;
  insert into test.hands as h values (acquire.consumer, acquire.member, got.partition, got.epoch, '{}')
  on conflict on constraint hands_pkey do update set epoch = excluded.epoch, partition = excluded.partition, offsets = '{}';
  perform test.peek(acquire.consumer, acquire.member);
  return got.epoch;
end $$;

create function test.peek(consumer text, member integer)
returns bigint[]
language plpgsql
as $$
declare
  hand test.hands;
begin
  select h.* into hand from test.hands h where h.consumer = peek.consumer and h.member = peek.member;
  select coalesce(array_agg(p."offset"), '{}'), bool_or(p.was_parked) into hand.offsets, hand.was_parked
  from pgonce.peek(peek.consumer, hand.partition, hand.epoch) p
  where hand.epoch is not null;
  if cardinality(hand.offsets) > 0 and (select c.paused from pgonce.consumers c where c.consumer = peek.consumer) then
    perform test.break_promise(peek.consumer, 'peek answered messages of a paused consumer');
  end if;
  update test.hands h set offsets = hand.offsets, was_parked = hand.was_parked
  where h.consumer = peek.consumer and h.member = peek.member;
  return hand.offsets;
end $$;

-- Whether what was answered may be: under the lock, or it was refused.
create function test.check_epoch(hand test.hands, outcome text)
returns void
language plpgsql
as $$
begin
  if outcome in ('acked', 'parked', 'dead') and (
    hand.epoch <> (
      select l.epoch from pgonce.leases l
      where l.consumer_id = test.id_of(hand.consumer) and l.partition = hand.partition)
    or exists (
      select from test.voided v
      where v.consumer = hand.consumer and v.partition = hand.partition and v.epoch >= hand.epoch)) then
    perform test.break_promise(hand.consumer, format('%s under epoch %s, which is over', outcome, hand.epoch));
  end if;
end $$;

create function test.ack(consumer text, member integer)
returns text
language plpgsql
as $$
declare
  hand test.hands;
  upto bigint;
  outcome text;
  outcomes text[] := '{}';
begin
  select h.* into hand from test.hands h where h.consumer = ack.consumer and h.member = ack.member;
  if hand.epoch is null then
    return null;
  end if;
  for i in 1 .. case when hand.was_parked then cardinality(hand.offsets) else least(cardinality(hand.offsets), 1) end loop
    upto := hand.offsets[case when hand.was_parked then i else cardinality(hand.offsets) end];
    select a.outcome into strict outcome
    from pgonce.ack(ack.consumer, hand.partition, hand.epoch, hand.offsets[i], upto) a;
    perform test.check_epoch(hand, outcome);
    if outcome = 'acked' then
      insert into test.applied (consumer_id, partition, "offset", message_id, key)
      select test.id_of(ack.consumer), q.partition, q."offset", q.message_id, q.key
      from pgonce.queue q
      join pgonce.consumers c using (topic_id)
      where c.consumer = ack.consumer and q.partition = hand.partition and q."offset" = any (hand.offsets)
        and q."offset" between hand.offsets[i] and upto
      order by q."offset";
      insert into test.totals as t (consumer_id, partition, total)
      select test.id_of(ack.consumer), hand.partition, count(*) from unnest(hand.offsets) o where o between hand.offsets[i] and upto
      on conflict (consumer_id, partition) do update set total = t.total + excluded.total;
    end if;
    outcomes := outcomes || outcome;
  end loop;
  return array_to_string(outcomes, ' ');
end $$;

create function test.nack(consumer text, member integer, permanent boolean default false)
returns text
language plpgsql
as $$
declare
  hand test.hands;
  outcome text;
begin
  select h.* into hand from test.hands h where h.consumer = nack.consumer and h.member = nack.member;
  if coalesce(cardinality(hand.offsets), 0) = 0 then
    return null;
  end if;
  select n.outcome into strict outcome
  from pgonce.nack(nack.consumer, hand.partition, hand.epoch, hand.offsets[1], 'as the specification says', nack.permanent) n;
  perform test.check_epoch(hand, outcome);
  if outcome in ('parked', 'dead') then
    insert into test.failed (consumer_id, partition, outcome) values (test.id_of(nack.consumer), hand.partition, outcome);
  end if;
  return outcome;
end $$;

create procedure test.drain(topic text, consumer text, rounds_max integer)
language plpgsql
as $$
declare
  moved bigint;
  got bigint;
  due_at timestamptz;
  idle integer := 0;
begin
  for round in 1 .. rounds_max loop
    select coalesce(sum(r.moved), 0) into strict moved from pgonce.relay(drain.topic) r;
    commit;
    perform test.make_due(drain.consumer);
    if (select c.kind from pgonce.consumers c where c.consumer = drain.consumer) = 'external' then
      perform test.acquire(drain.consumer, 9);
      commit;
      perform test.ack(drain.consumer, 9);
      select l.lag + l.parked into strict got from pgonce.consumer_lag l where l.consumer = drain.consumer;
    else
      got := test.apply(drain.consumer);
    end if;
    commit;
    -- Once a receive may do nothing but leave out what is parked ahead; then the next one finds it.
    idle := case when moved = 0 and got = 0 then idle + 1 else 0 end;
    if idle >= 2 then
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
    'is_external', exists (select from pgonce.leases l where l.consumer_id = h.consumer_id),
    'ledger', (select coalesce(jsonb_agg(l order by l."position"), '[]') from test.ledger l where l.topic = state.topic),
    'taken_back', (select coalesce(jsonb_agg(b.message_id), '[]') from test.taken_back b where b.topic = state.topic),
    'queue', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'partition', q.partition, 'offset', q."offset", 'message_id', q.message_id) order by q.partition, q."offset"), '[]')
      from pgonce.queue q where q.topic_id = h.topic_id),
    'purged', (
      select coalesce(jsonb_agg(u order by u.partition, u."offset"), '[]') from test.purged u where u.topic_id = h.topic_id),
    'parked', (
      select coalesce(jsonb_agg(k.message_id), '[]') from pgonce.parked k
      where k.consumer_id = h.consumer_id and k.taken_by is null),
    'dead_letters', (
      select coalesce(jsonb_agg(jsonb_build_object('message_id', d.message_id, 'partition', d.partition, 'state', d.state)), '[]')
      from pgonce.dead_letters d where d.consumer_id = h.consumer_id),
    'failed', (
      select coalesce(jsonb_agg(f), '[]') from test.failed f where f.consumer_id >= h.first_consumer_id),
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
        select p.consumer_id from pgonce.processed_ids p where p.consumer_id >= h.first_consumer_id
        union all
        select k.consumer_id from pgonce.parked k where k.consumer_id >= h.first_consumer_id
        union all
        select d.consumer_id from pgonce.dead_letters d where d.consumer_id >= h.first_consumer_id) x
      where x.consumer_id not in (select c.consumer_id from pgonce.consumers c)),
    'broken', (
      select coalesce(jsonb_agg(b.words), '[]')
      from (
        select b.words from test.broken b where b.topic = state.topic
        union all
        select format('once applied: %s came %s times to the inbox', i.message_id, count(*) filter (where not i.was_duplicate))
        from test.inbox i where i.topic = state.topic
        group by i.message_id
        having count(*) filter (where not i.was_duplicate) <> 1
        union all
        select format('a dead letter was settled %s times', count(*))
        from test.settled s where s.topic = state.topic
        group by s.dead_letter_id
        having count(*) > 1) b))
  from here h);
end $$;
