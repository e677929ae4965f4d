-- What a function of a single expression or statement does, of which PostgreSQL keeps no text: as the plan into which it is
-- inlined. The first parameter stands for its name, the second for its arguments as columns, which have no values, and the
-- third for a call of it, or for what its text says.
explain (verbose, costs off) select shown.* from (select $2 offset 0) as $1 cross join lateral (select $3) as shown
