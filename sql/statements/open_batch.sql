-- The statements of the consumer find `received`, and tables of pgonce, behind what their own search_path shows.
with opened as materialized (
  select
    pgonce.open_batch($1, max => $2) as messages,
    set_config('search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), quote_ident($3)), true) as path
)
select o.messages, o.path <> '' and to_regclass('received') = 'pgonce.received'::regclass as finds_received
from opened o
