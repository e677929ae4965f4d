-- In a block, because the name of a channel is no parameter.
do $$ begin execute pg_catalog.format('listen %I', 'pgonce.watch'); end $$
