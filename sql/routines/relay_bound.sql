-- The relay's lower bound: from where the outbox is scanned. Why it is safe is also told in docs/adr/0001.
--
-- A transaction may commit a low seq after higher ones were relayed, so there is no cursor. But a scan from the start is
-- slow, the more so while an old snapshot keeps dead entries. A bound is safe at seq c once every transaction that drew a
-- seq up to c has ended. A transaction has its xid before it draws (the column default and enqueue see to that), and
-- numbers are drawn in order (CACHE 1). So relay reads the last seq drawn, c, and after that is given its own xid, r:
-- whoever drew up to c has an xid below r. Once r has ended, a snapshot knows of every xid below r whether it is still
-- open: that makes (c, r) a candidate which the *next* call adopts. (The snapshot of this call would not do: an open xid
-- above its xmax is in none of its lists. That lost a message.)
--
-- Transactions that are still open at the adoption are listed in open_xids, each with a seq below all its rows: floor,
-- since a transaction that was not seen open at the adoption before has drawn nothing up to that one's candidate. When
-- one of them has ended, the scan that finds it so starts from there, and it is struck off. A row that a scan leaves
-- behind keeps the bound below it. Which bound holds is decided by the snapshot of the claiming statement itself: if it
-- can see a later message of a key, it also sees that the transaction before it has ended.

create or replace function pgonce.last_drawn()
returns bigint
language plpgsql volatile
as $$
begin
  return (select case when s.is_called then s.last_value else s.last_value - 1 end from pgonce.outbox_seq s);
end $$;
comment on function pgonce.last_drawn is 'Internal: the last number that was drawn for an outbox row, by whatever transaction.';

create or replace function pgonce.has_ended(xid xid8, at pg_snapshot)
returns boolean
language sql immutable parallel safe
-- An xid that the snapshot cannot know yet comes from another server, by way of a restored dump.
return pg_visible_in_snapshot(xid, at) or xid >= pg_snapshot_xmax(at);
comment on function pgonce.has_ended is 'Internal: whether a transaction that was once open has ended, as a snapshot sees it.';

create or replace function pgonce.scan_from(scanned bigint, open_xids xid8[], open_from bigint[], at pg_snapshot)
returns bigint
language plpgsql immutable parallel safe
-- In plpgsql, which keeps its plans for the session: a function in SQL that is not inlined is planned at each call.
as $$
begin
  return case
    when open_xids = '{}' then scanned
    else least(scanned, (
      select min(o.start) from unnest(open_xids, open_from) o(xid, start) where pgonce.has_ended(o.xid, at)))
  end;
end $$;
comment on function pgonce.scan_from is 'Internal: the bound at or below which nothing PENDING is to be found in a snapshot.';

create or replace function pgonce.without_bound(head pgonce.heads)
returns pgonce.heads
language plpgsql immutable
as $$
begin
  head.scanned := 0;
  head.floor := 0;
  head.open_xids := '{}';
  head.open_from := '{}';
  head.candidate_seq := null;
  head.candidate_xid := null;
  return head;
end $$;
comment on function pgonce.without_bound is 'Internal: the head with no bound, so that the outbox is scanned from its start.';

create or replace function pgonce.advance_bound(
  head pgonce.heads, drawn bigint, moved bigint, done_up_to bigint, at pg_snapshot)
returns pgonce.heads
language plpgsql volatile
as $$
declare
  adopts boolean;
begin
  adopts := coalesce(head.candidate_xid < pg_snapshot_xmax(at), false);
  select coalesce(array_agg(o.xid order by o.xid), '{}'), coalesce(array_agg(o.start order by o.xid), '{}')
  into head.open_xids, head.open_from
  from (
    select k.xid, k.start from unnest(head.open_xids, head.open_from) k(xid, start)
    where not pgonce.has_ended(k.xid, at)
    union all
    select x, head.floor from pg_snapshot_xip(at) x
    where adopts and x < head.candidate_xid and x <> all (head.open_xids)
  ) o(xid, start);
  if adopts then
    head.floor := head.candidate_seq;
  end if;
  head.scanned := least(case when adopts then head.floor else head.scanned end, done_up_to);
  if head.candidate_xid is distinct from pg_current_xact_id() then
    head.candidate_seq := case when moved > 0 then drawn end;
    head.candidate_xid := case when head.candidate_seq is not null then pg_current_xact_id() end;
  end if;
  return head;
end $$;
comment on function pgonce.advance_bound is 'Internal: the head with the bound for the next call. done_up_to is the seq up to which the claiming statement left nothing PENDING, at its snapshot, drawn the last seq that had been drawn before this transaction had an xid, or null.';

create or replace function pgonce.restore_sequence()
returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  floor bigint := (select max(h.floor) from pgonce.heads h);
begin
  if (select s.last_value from pgonce.outbox_seq s) < floor then
    -- Nobody draws a number while this lock is held.
    lock table pgonce.outbox in share row exclusive mode;
    perform setval('pgonce.outbox_seq', greatest(floor, (select s.last_value from pgonce.outbox_seq s)));
  end if;
  return (select s.last_value from pgonce.outbox_seq s);
end $$;
comment on function pgonce.restore_sequence is 'Lifts outbox_seq above all that was relayed, where it fell behind: a logical replica does not carry sequences. Call it after the promotion, before the first producer writes: what is enqueued with numbers that were used before may be overlooked. Answers the last number drawn. Locks the outbox against writers where there is something to do.';
