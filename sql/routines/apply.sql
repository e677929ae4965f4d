-- Apply: the statements of an sql consumer over the view `received`, in the transaction that opened the batch.
--
-- Both functions run with the rights of the caller, and the statements find what the caller's search_path shows.
-- Locks: none of its own; those of fail, of which the caller holds the only one already.

create or replace function pgonce.apply_statements(statements text)
returns void
language plpgsql volatile
as $$
begin
  execute statements;
end $$;
comment on function pgonce.apply_statements is 'Runs the statements of an sql consumer, with the rights and the search_path of the caller, each with a snapshot of its own. COMMIT and ROLLBACK fail in here: what was received commits together with all of its effect, or not at all.';

create or replace function pgonce.try_statements(
  consumer text,
  partition integer,
  offsets bigint[],
  statements text,
  path text default current_setting('search_path'))
returns setof pgonce.tried
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  rest bigint[] := offsets;
  -- What failed before will do so again as likely as not.
  start constant integer := case current_setting('pgonce_batch.is_of_parked', true) when 'true' then 1 else 32 end;
  longest integer := 100;
  next integer := start;
  tried integer;
  suspect bigint;
  mark bigint;
  looked_at bigint;
  collects boolean := false;
  state text;
  message text;
  failure pgonce.failed;
  answer pgonce.tried := (0, '{}');
begin
  perform set_config('pgonce_batch.is_traced', 'true', true);
  -- From the front, so that a key keeps its order.
  while cardinality(rest) > 0 loop
    tried := least(next, cardinality(rest));
    perform set_config('pgonce_batch.first_offset', rest[1]::text, true),
            set_config('pgonce_batch.last_offset', rest[tried]::text, true),
            set_config('pgonce_batch.has_gaps', (rest[tried] - rest[1] + 1 <> tried)::text, true);
    mark := nextval('pgonce.looks');
    begin
      -- A failure puts back the path, with all else.
      perform set_config('search_path', path, true);
      execute statements;
      perform set_config('search_path', 'pg_catalog, pg_temp', true);
      begin
        -- Deferred constraints are looked at, and are deferred again.
        set constraints all immediate;
        raise sqlstate 'PO000';
      exception when sqlstate 'PO000' then
        null;
      end;
      rest := rest[tried + 1:];
      collects := false;
      next := case when rest[1] = suspect then 1 else least(longest, 2 * tried) end;
    exception when others then
      get stacked diagnostics state = returned_sqlstate, message = message_text;
      if state in ('40001', '40P01', '55P03', '25006')
        or left(state, 2) in ('08', '0A', '2D', '3D', '3F', '42', '53', '57', '58', 'F0', 'XX') then
        -- No message is to blame: the connection, the server, another transaction, or the statements themselves.
        raise;
      elsif tried = 1 then
        select f.* into strict failure
        from pgonce.fail(consumer, partition, rest[1], message || ' (' || state || ')', state = 'PO013') f;
        if rest[1] <> all (failure.withdrawn) then
          raise exception using errcode = 'PO003', message = format('offset %s of consumer %L', rest[1], consumer),
            hint = 'This transaction has not received it: try_statements is for messages of the batch that is open.';
        end if;
        answer.failed := answer.failed + 1;
        answer.withdrawn := answer.withdrawn || failure.withdrawn;
        rest := case when cardinality(failure.withdrawn) = 1 then rest[2:]
          else array(select r from unnest(rest) r where r <> all (failure.withdrawn) order by r) end;
        next := least(start, longest);
      else
        -- Most plans fail at the row that they looked at last: it is tried by itself, once those in front of it are
        -- applied. Others collect all rows first, so that the last one says nothing; for them only small parts do.
        looked_at := (nextval('pgonce.looks') - mark - 2) % tried + 1;
        if looked_at between 1 and tried - collects::integer then
          collects := looked_at = tried;
          suspect := rest[looked_at];
          next := greatest(looked_at - 1, 1);
        else
          longest := least(longest, 16);
          next := least(longest, tried / 2);
        end if;
      end if;
    end;
  end loop;
  perform set_config('pgonce_batch.is_traced', 'false', true);
  return next answer;
end $$;
comment on function pgonce.try_statements is 'Runs the statements of an sql consumer over some messages of the batch that is open. Where they fail, it finds out which messages fail by themselves, and calls fail for these, as permanent where they raised the SQLSTATE PO013. Answers how many they are, and what the transaction has no longer received. path is what the statements find their tables by.';
