// Bench measures what a gateway costs: it runs plain forwarding, HAProxy, nginx, ours and upstream's gateway one
// after the other in the same network namespaces, checks every byte, and reports medians, spreads and ratios.
//
//	go run ./bench run --arms l3,haproxy,haproxy-splice,nginx,ours --rounds 5 --json out.json --md out.md --svg dir
//	go run ./bench run --quick     # one short round: does everything run, is content intact?
//	go run ./bench list            # the cases
//	go run ./bench soak            # 8,000 connections of all tempers for a minute: no byte wrong, nothing leaked
//
// It needs root and installs nothing. Compare numbers of one run only, and quote ratios.
package main
